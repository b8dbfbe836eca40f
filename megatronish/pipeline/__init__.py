"""Pipeline parallelism: schedules as lists, lowered to communication, proved, then run."""
