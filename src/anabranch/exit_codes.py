"""What an exit code tells whoever started the command. Launchers, workers and their children agree on these."""

from __future__ import annotations

DONE = 0
MUST_ACT = 2  # the user must change something: starting it again changes nothing
TRY_AGAIN = 75  # trouble of this machine or of the store (EX_TEMPFAIL): start it again, later or elsewhere
PREEMPTED = 85  # asked to stop, and saved: start it again
