#!/usr/bin/env python3
"""Prints the constants of crates/eval/tests/metrics.rs from independent definitions, in exact fractions where there are any.

Run: python tests/reference/metrics.py
"""

from fractions import Fraction
from itertools import combinations
from math import comb, sqrt
from statistics import NormalDist


def pass_at_k(n, c, k):
    """The share of k-subsets of n samples that hold one of the c right ones, by enumeration."""
    subsets = list(combinations(range(n), k))
    return Fraction(sum(any(i < c for i in subset) for subset in subsets), len(subsets))


def mcnemar(gained, lost):
    n = gained + lost
    tail = sum(comb(n, i) for i in range(min(gained, lost) + 1))
    return min(Fraction(1), Fraction(2 * tail, 2**n))


def wilson(successes, n):
    """The two proportions p at which the score test of the observed one is at the edge of rejection, by bisection."""
    z = NormalDist().inv_cdf(0.975)
    observed = successes / n

    def edge(low, high, sign):
        for _ in range(200):
            p = (low + high) / 2
            rejected = abs(observed - p) > z * sqrt(p * (1 - p) / n)
            if rejected == (sign > 0):
                high = p
            else:
                low = p
        return (low + high) / 2

    return edge(0, observed, -1), edge(observed, 1, 1)


print("z", repr(NormalDist().inv_cdf(0.975)))
for case in [(5, 2, 1), (5, 2, 3), (8, 3, 4), (10, 1, 5), (10, 9, 2)]:
    print("pass_at_k", case, float(pass_at_k(*case)))
for case in [(0, 0), (1, 0), (5, 1), (10, 3), (30, 12), (700, 600)]:
    print("mcnemar", case, float(mcnemar(*case)))
for case in [(8, 10), (50, 200), (1, 300), (199, 200)]:
    print("wilson", case, wilson(*case))
