"""Numbers as people read them: counts, bytes, durations. One way for every table and message."""

import datetime


def format_count(value: float) -> str:
    """Return 10_731_524_096 as '10.7 B', 1500 as '1.5 k'."""
    if abs(value) < 999.5:
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def format_bytes(value: float) -> str:
    """Return decimal bytes: 1_500_000 as '1.5 MB'."""
    if abs(value) < 999.5:
        return f"{value:.0f} B"
    return _scaled(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Return three digits of the largest unit that the rounded value fills: 999_999 is '1 M', not '1e+03 k'."""
    for limit, suffix in units:
        if abs(value) >= 0.9995 * limit:
            digits = f"{value / limit:.3g}"
            return f"{digits if 'e' not in digits else f'{value / limit:.0f}'} {suffix}"
    raise ValueError(value)


def format_duration(seconds: float) -> str:
    """Return 93784 as '1 d 2 h', 125 as '2 min 5 s', 3.21 as '3.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def format_time(timestamp: float) -> str:
    """Return a Unix time as UTC, ISO 8601, to the second."""
    moment = datetime.datetime.fromtimestamp(timestamp, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
