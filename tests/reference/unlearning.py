"""Reference values for the measures of unlearning: SciPy's two-sample test and harmonic mean, Google's ROUGE-L.

    pip install scipy rouge-score && python tests/reference/unlearning.py > tests/reference/unlearning.json

crates/eval/tests/unlearning.rs compares with them.
"""

import json
import math

import numpy
from rouge_score import rouge_scorer
from scipy import stats
from scipy.special import kolmogorov

SIZES = [(3, 5, 0.0), (8, 8, 1.5), (20, 20, 0.3), (20, 20, 2.0), (40, 25, 0.8), (40, 40, 3.5), (400, 400, 0.1), (400, 360, 1.0)]
TEXTS = [
    ("The author was born in Kuwait City in 1956.", "The author's full name is Basil Mahfouz Al-Kuwaiti, born in Kuwait City."),
    ("She writes historical fiction", "He writes crime fiction, and historical novels."),
    ("", "Nothing at all"),
    ("one two three four five six", "two four one six three"),
    ("Ada Fellbrook's father was a baker", "Ada Fellbrook's father was a baker"),
]


def samples(index, n, m, shift):
    """Fixed numbers without structure; rounded so that the file holds them exactly."""
    first = numpy.sin(12.9898 * numpy.arange(n) + index)
    second = numpy.sin(78.233 * numpy.arange(m) + 2 * index) + shift
    return numpy.round(first, 6).tolist(), numpy.round(second, 6).tolist()


def main():
    tests = []
    for index, (n, m, shift) in enumerate(SIZES):
        first, second = samples(index, n, m, shift)
        found = stats.ks_2samp(first, second, method="exact")
        root = math.sqrt(n * m / (n + m))
        asymptotic = float(kolmogorov((root + 0.12 + 0.11 / root) * found.statistic))
        tests.append({
            "first": first, "second": second, "statistic": float(found.statistic), "p_value": float(found.pvalue),
            "asymptotic": asymptotic,
        })
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [{"candidate": candidate, "reference": reference, "recall": scorer.score(reference, candidate)["rougeL"].recall}
             for candidate, reference in TEXTS]
    means = [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 0.01]]
    harmonic = [{"values": values, "mean": float(stats.hmean(values))} for values in means]
    print(json.dumps({"kolmogorov_smirnov": tests, "rouge": rouge, "harmonic": harmonic}))


main()
