"""Exported workers: scripts that are run here, and a Job that Kubernetes' own schema accepts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from stand_in import needs_engine

from anabranch.errors import OutputError, RecipeError
from anabranch.launch.export import export_jobs, job_name, kubernetes_job
from anabranch.recipe import ExportSection

STORE = "s3://bucket/run"


def kubernetes(**changes: object) -> ExportSection:
    return ExportSection(**({"kind": "kubernetes", "image": "registry.example/anabranch:1", "workers": 3} | changes))


def worker_with(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `anabranch` is a small program of ours."""
    folder.mkdir()
    (folder / "anabranch").write_text(f"#!{sys.executable}\nimport os, signal, sys, time\nfrom pathlib import Path\n"
                                      f"folder = Path({str(folder)!r})\n{body}")
    (folder / "anabranch").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_script_for_each_worker_and_stale_ones_go(tmp_path):
    export_jobs(STORE, ExportSection(workers=5), tmp_path)
    files = export_jobs(STORE, ExportSection(workers=2), tmp_path)
    assert [f.name for f in files] == ["worker-0.sh", "worker-1.sh", "README.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "worker-0.sh", "worker-1.sh"]
    assert all(os.access(f, os.X_OK) for f in files[:2])
    assert f"anabranch status {STORE} --watch" in files[2].read_text()


@pytest.mark.parametrize("kind", ["shell", "kubernetes"])
@pytest.mark.parametrize("trust", [True, False])
def test_trust_is_passed_on_only_when_asked(tmp_path, kind, trust):
    section = kubernetes() if kind == "kubernetes" else ExportSection()
    text = "".join(p.read_text() for p in export_jobs(STORE, section, tmp_path, trust=trust) if p.name != "README.md")
    assert ("--trust" in text) == trust


@pytest.mark.parametrize("name", ["a run", "a'b", "$(touch pwned)", "x\ntouch pwned\n", "`touch pwned`", "; touch pwned #"])
def test_a_folder_of_any_name_is_one_argument(tmp_path, name):
    environment = worker_with(tmp_path / "bin", "(folder / 'got').write_text(sys.argv[2])")
    script = export_jobs(str(tmp_path / name), ExportSection(workers=1), tmp_path / "out")[0]
    subprocess.run([script], env=environment, cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "bin" / "got").read_text() == str(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_worker_that_was_preempted_is_started_again_and_a_crash_is_told(tmp_path):
    environment = worker_with(tmp_path / "bin", "tries = folder / 'tries'\n"
                              "n = len(tries.read_text()) if tries.exists() else 0\ntries.write_text('x' * (n + 1))\n"
                              "sys.exit([85, 3][n])")
    script = export_jobs(STORE, ExportSection(workers=1), tmp_path / "out")[0]
    done = subprocess.run([script], env=environment, timeout=30)
    assert (done.returncode, (tmp_path / "bin" / "tries").read_text()) == (3, "xx")


def test_a_worker_in_trouble_is_started_again_ever_more_slowly(tmp_path):
    codes = [75, 75, 85, 75, 75, 75, 75, 2]
    environment = worker_with(tmp_path / "bin", "tries = folder / 'tries'\n"
                              "n = len(tries.read_text()) if tries.exists() else 0\ntries.write_text('x' * (n + 1))\n"
                              f"sys.exit({codes}[n])")
    (tmp_path / "bin" / "sleep").write_text(f"#!/bin/sh\necho $1 >> '{tmp_path}/slept'\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    script = export_jobs(STORE, ExportSection(workers=1), tmp_path / "out")[0]
    done = subprocess.run([script], env=environment, timeout=30, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len((tmp_path / "bin" / "tries").read_text())) == (2, 8)
    assert (tmp_path / "slept").read_text().split() == ["60", "120", "5", "240", "480", "600", "600"]
    assert done.stderr.count("trouble") == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_script_that_waits_ends_at_once_when_it_is_told_to(tmp_path, number):
    environment = worker_with(tmp_path / "bin", "sys.exit(75)")
    script = export_jobs(STORE, ExportSection(workers=1), tmp_path / "out")[0]
    process = subprocess.Popen([script], env=environment, stderr=subprocess.PIPE, text=True)
    assert "started again in 60 s" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(10) == 85


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_script_that_is_told_to_stop_lets_its_worker_save(tmp_path, number):
    environment = worker_with(tmp_path / "bin", "def stop(*_):\n    time.sleep(1)\n    (folder / 'saved').touch()\n"
                              "    sys.exit(85)\nsignal.signal(signal.SIGTERM, stop)\n(folder / 'begun').touch()\n"
                              "time.sleep(60)")
    script = export_jobs(STORE, ExportSection(workers=1), tmp_path / "out")[0]
    process = subprocess.Popen([script], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "bin" / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 85
    assert (tmp_path / "bin" / "saved").exists()


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
@pytest.mark.parametrize("changes", [{}, {"gpus": 8, "secret": "bucket-keys", "memory": "0.5Ti"}, {"workers": 1}])
def test_the_job_fits_the_schema_of_kubernetes(tmp_path, version, changes):
    try:
        import kubernetes_validate as validate
    except ImportError:
        needs_engine("Kubernetes' schema is not installed: pip install kubernetes-validate")
    job = yaml.safe_load(export_jobs(STORE, kubernetes(**changes), tmp_path)[0].read_text())
    validate.validate(job, version, strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(job | {"spec": job["spec"] | {"podFailurePolicies": {}}}, version, strict=True)


def test_what_the_schema_does_not_say():
    """Rules of the API server: https://kubernetes.io/docs/concepts/workloads/controllers/job/"""
    job = kubernetes_job(STORE, kubernetes(gpus=1), ["anabranch", "work", STORE])
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy wants it
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 3
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    assert by_code == {2: "FailJob", 75: "Count", 85: "Ignore"}
    assert spec["backoffLimit"] >= spec["completions"]  # what 75 counts towards
    assert all(rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"] for rule in rules if "onExitCodes" in rule)
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]  # they may not differ


@pytest.mark.parametrize("root", ["s3://bucket/Run_7", "s3://b/--x--", "gs://b/" + "long." * 40, "s3://b/ümlaut/", "s3://b/..."])
def test_a_job_has_a_name_that_kubernetes_takes(root):
    name = job_name(root)
    assert len(name) <= 45 and all(c.isdigit() or c == "-" or "a" <= c <= "z" for c in name)
    assert name[0].isalpha() and name[-1] != "-"


def test_all_that_is_wrong_in_one_message(tmp_path):
    with pytest.raises(RecipeError) as error:
        export_jobs("/data/run", ExportSection(kind="kubernetes", secret="AKIA/SECRET=", memory="lots"), tmp_path)
    text = str(error.value)
    assert all(word in text for word in ("launch.store", "image", "secret", "memory")), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("root", ["s3://key:hunter2@bucket/run", "s3://bucket/run?sig=hunter2", "s3://[hunter2/run"])
@pytest.mark.parametrize("kind", ["shell", "kubernetes"])
def test_credentials_in_the_address_are_refused_and_not_repeated(tmp_path, root, kind):
    with pytest.raises(RecipeError) as error:
        export_jobs(root, kubernetes() if kind == "kubernetes" else ExportSection(), tmp_path)
    assert "hunter2" not in str(error.value)


def test_a_secret_is_named_and_nothing_of_the_environment_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    for kind in (kubernetes(secret="bucket-keys"), ExportSection()):
        texts = [p.read_text() for p in export_jobs(STORE, kind, tmp_path / kind.kind)]
        assert not any("hunter2" in text for text in texts)
    job = yaml.safe_load((tmp_path / "kubernetes" / "job.yaml").read_text())
    assert job["spec"]["template"]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export_jobs(STORE, ExportSection(), tmp_path / "file")
