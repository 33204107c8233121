"""The exit codes of every command and what a supervisor makes of them."""

DONE = 0
BAD_INPUT = 2  # argparse's and tyro's, too
DIVERGED = 3
HANG = 4
STORAGE = 5
PEERS_LOST = 6  # another process or host of the run is gone: restart all of them
PREEMPTED = 42  # saved: run the same command again to go on

FINAL = (DONE, BAD_INPUT, DIVERGED, PREEMPTED)  # a restart changes nothing, or is not wanted
