"""The exit codes of ``ring-mlx`` besides 0, success, and 1, a check that found a problem."""

BAD_INPUT, CUT_OFF, INTERRUPTED, BROKEN_PIPE = 2, 4, 130, 141
