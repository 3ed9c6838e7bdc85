"""What a user did that cannot be done: one line on standard error, exit status 2."""


class UsageError(ValueError):
    """Names the thing and the mend."""


class Refused(Exception):
    """A subject says that it does not do this: the case is SKIPPED."""


class Misbehaved(Exception):
    """A subject's answer that cannot be judged: the case FAILs with the reason."""
