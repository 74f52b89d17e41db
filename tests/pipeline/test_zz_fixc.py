import sys
sys.path.insert(0, "/work/main/tests"); sys.path.insert(0, "/work/main/tests/pipeline")
import test_hostile_artifacts as t
import random, pytest
def test_one(world, monkeypatch):
    from anabranch import worker
    def start(*_): raise AssertionError("a child was started")
    monkeypatch.setattr(worker, "attend", start)
    told=[]
    world.__class__.work = lambda self: told.append(worker.work(self.root, cache=self.above/"cache", tell=print))
    for case in t.names(world, random.Random("names 7")):
        if case[0].startswith("objects"):
            r = t.judged(world, case); print(case[0], r, told); assert not r
from test_hostile_artifacts import world
