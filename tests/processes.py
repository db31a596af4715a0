"""Other processes, and the processor time that they took: other work on the machine does not count."""
import os
import subprocess


def processor_time(command: list[str], env: dict[str, str]) -> tuple[subprocess.CompletedProcess, float]:
    """The finished process (its output as text) and the seconds of user and system time that it and its own took."""
    before = os.times()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])
