"""Bytes and seconds as a person reads them."""

from __future__ import annotations


def human_size(size: float) -> str:
    """Bytes in the unit that a person would use: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def human_time(seconds: float) -> str:
    """Seconds as '4.2 s', '3 min 05 s' or '2 h 07 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
