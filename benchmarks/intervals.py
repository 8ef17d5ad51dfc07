"""The 95 % t interval of a mean. This file imports nothing but Python's own library."""

from statistics import mean, stdev

# Student's t, two-sided, by the number of values
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def bounds(values: list[float]) -> tuple[float, float]:
    """Returns the bounds of the 95 % t interval of the mean of at least two values."""
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half
