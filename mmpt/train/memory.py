"""Memory of a training process on a CPU: what is freed is kept for the next step."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed() -> bool:
    """Have the C library keep freed memory instead of giving it back; whether it can.

    A step asks for the same tensors as the one before. Given back, each of them comes as new pages,
    which the system must clear first: that can take longer than what is computed in them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is None:
        return False
    return all([mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(MMAP_THRESHOLD, 1 << 25)])
