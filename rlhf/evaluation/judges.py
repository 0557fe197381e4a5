"""Judges: callables `judge(prompts, responses) -> list of floats`, higher is better, that no training stage sees."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import UserError
from rlhf.evaluation.text_metrics import WORD_PATTERN

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

logger = logging.getLogger(__name__)

# Raised when the stored layout or the fitting procedure changes: files of an earlier version are then not found.
_CACHE_VERSION = 2
_HTML_TAG = re.compile(r"<[^>]{1,20}>")
# What numpy and zipfile raise on a file that is truncated, overwritten, or of another layout.
_DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class JudgeSettings:
    """Hyperparameters of `SentimentJudge`.

    Attributes:
        max_features: most frequent uni- and bigrams kept.
        min_df: texts that a term must occur in to be kept.
        inverse_regularisation: C of the logistic regression. Of 1 to 100, 10 has the lowest log loss on held-out
            32-word openings of reviews: it is about as sure of short texts as it is right.
        held_out_fraction: share of the texts kept out of the fit to measure the accuracy, in (0, 1).
        short_words: words of the openings that the second accuracy is measured on.
        seed: of the split into fitted and held-out texts.
    """

    max_features: int = 100_000
    min_df: int = 2
    inverse_regularisation: float = 10.0
    held_out_fraction: float = 0.1
    short_words: int = 32
    seed: int = 0


class SentimentJudge:
    """P(positive) of a continuation: TF-IDF of uni- and bigrams, and logistic regression.

    It reads the response **without its prompt**, so a policy gains nothing by the prompts it was given.

    Attributes:
        held_out_accuracy: on whole texts that the fit did not see.
        held_out_short_accuracy: on the first `settings.short_words` words of these texts, which are about as long as
            what the judge is asked about. Expect it to be much lower.
        held_out_n: number of those texts.
        fingerprint: sha256 of training texts, labels, settings and the scikit-learn version.
        settings: the hyperparameters.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], settings: JudgeSettings, fingerprint: str) -> None:
        """Rebuilds a fitted judge from its arrays; use `fit`."""
        self.settings = settings
        self.fingerprint = fingerprint
        self.held_out_accuracy = float(arrays["held_out_accuracy"])
        self.held_out_short_accuracy = float(arrays["held_out_short_accuracy"])
        self.held_out_n = int(arrays["held_out_n"])
        self._coefficients, self._intercept = arrays["coefficients"], float(arrays["intercept"])
        terms = arrays["terms"].tobytes().decode("utf-8").split("\n")
        if not len(terms) == len(arrays["idf"]) == len(self._coefficients):
            raise ValueError(f"judge: {len(terms)} terms, {len(arrays['idf'])} idf, {len(self._coefficients)} weights")
        self._vectorizer = _vectorizer(terms)
        self._vectorizer.idf_ = arrays["idf"]

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[int],
        cache_dir: str | os.PathLike[str] | None = None,
        settings: JudgeSettings | None = None,
    ) -> SentimentJudge:
        """Fits on labelled texts, or loads the same fit from the cache.

        Args:
            texts: at least 20 strings.
            labels: one per text, 1 = positive, 0 = negative; both must occur.
            cache_dir: where fits are kept; None means `$XDG_CACHE_HOME/rlhf`, or `~/.cache/rlhf`. A file there that
                is damaged, and a folder that cannot be written, cost a warning and a new fit.
            settings: hyperparameters; None means the defaults.

        Raises:
            UserError: lengths differ, too few texts, a label other than 0 and 1, one class missing, no usable words.
        """
        settings = settings or JudgeSettings()
        _check_training_data(texts, labels)
        fingerprint = _fingerprint(texts, labels, settings)
        path = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / f"judge-{fingerprint}.npz"
        if path.exists():
            try:
                return cls(_read(path), settings, fingerprint)
            except _DAMAGED as error:
                logger.warning("judge cache %s is damaged (%s); fitting again", path, error)
        arrays = _fit_arrays(texts, np.asarray(labels), settings)
        try:
            _write_atomically(path, arrays)
        except OSError as error:
            logger.warning("judge cache %s cannot be written (%s); going on without", path, error)
        return cls(arrays, settings, fingerprint)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """P(positive) in [0, 1] of each response; the prompts are not read.

        Raises:
            UserError: different numbers of prompts and responses.
        """
        _check_lengths("SentimentJudge", prompts, responses)
        if not responses:
            return []
        logits = self._vectorizer.transform(responses) @ self._coefficients + self._intercept
        return _sigmoid(logits).tolist()


def vader_judge(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each response, in [-1, 1] (Hutto and Gilbert 2014); the prompts are not read.

    A word list with rules, fitted on nothing: a second opinion that shares no error with a trained judge.

    Raises:
        UserError: vaderSentiment is not installed; different numbers of prompts and responses.
    """
    _check_lengths("vader_judge", prompts, responses)
    analyzer = _vader_analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/rlhf`, or `~/.cache/rlhf` where the variable is unset or, as its standard says, relative."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "rlhf"


@functools.lru_cache(maxsize=1)
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise UserError(
            f"judge vader: the package {error.name!r} is not installed; run: pip install -e .[tiny]"
        ) from error
    return SentimentIntensityAnalyzer()


def _clean(text: str) -> str:
    """Lower case without HTML tags: IMDB's `<br />` would be its most frequent word, and no model writes it."""
    return _HTML_TAG.sub(" ", text).lower()


def _vectorizer(vocabulary: list[str]) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        preprocessor=_clean,
        token_pattern=WORD_PATTERN,
        ngram_range=(1, 2),
        sublinear_tf=True,
        vocabulary=vocabulary,
        dtype=np.float64,
    )


def _vocabulary(texts: Sequence[str], settings: JudgeSettings) -> list[str]:
    """The terms that occur in most texts, most frequent first; equal counts in alphabetical order.

    scikit-learn would first number, sort and count the million terms that occur once, which takes twice as long.
    """
    analyze = _vectorizer([]).build_analyzer()
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(set(analyze(text)))
    frequent = [(-count, term) for term, count in counts.items() if count >= settings.min_df]
    if not frequent:
        raise UserError(f"judge: no word occurs in {settings.min_df} of {len(texts)} texts; give real text")
    return [term for _, term in sorted(frequent)[: settings.max_features]]


def _fit_arrays(texts: Sequence[str], labels: NDArray[Any], settings: JudgeSettings) -> dict[str, NDArray[Any]]:
    """Fits on all but the held-out texts and measures on those; everything the judge is, as plain arrays."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    order = np.random.default_rng(settings.seed).permutation(len(texts))
    held_out_n = max(1, round(settings.held_out_fraction * len(texts)))
    held_out, fitted = order[:held_out_n], order[held_out_n:]
    if len(set(labels[fitted].tolist())) < 2:
        raise UserError(f"judge: the {len(fitted)} texts left to fit have one label only; give more texts of the other")
    vocabulary = _vocabulary([texts[i] for i in fitted], settings)
    vectorizer = _vectorizer(vocabulary)
    features = vectorizer.fit_transform([texts[i] for i in fitted])
    # One thread: the solver's vector operations are too short to share, and threads that wait for each other on busy
    # cores made it ten times slower. It also makes the fit independent of the number of cores.
    with threadpool_limits(limits=1):
        model = LogisticRegression(C=settings.inverse_regularisation, max_iter=1000).fit(features, labels[fitted])

    def accuracy(sample: list[str]) -> float:
        return float(np.mean(model.predict(vectorizer.transform(sample)) == labels[held_out]))

    whole = [texts[i] for i in held_out]
    short = [" ".join(_clean(text).split()[: settings.short_words]) for text in whole]
    # Text as bytes: numpy's unicode arrays would pad every term to the longest.
    terms = "\n".join(vocabulary).encode("utf-8")
    return {
        "terms": np.frombuffer(terms, dtype=np.uint8),
        "idf": vectorizer.idf_,
        "coefficients": model.coef_[0],
        "intercept": model.intercept_[0],
        "held_out_accuracy": np.float64(accuracy(whole)),
        "held_out_short_accuracy": np.float64(accuracy(short)),
        "held_out_n": np.int64(held_out_n),
    }


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    # tanh saturates where exp would overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def _fingerprint(texts: Sequence[str], labels: Sequence[int], settings: JudgeSettings) -> str:
    import sklearn

    header = {"version": _CACHE_VERSION, "sklearn": sklearn.__version__, "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for text, label in zip(texts, labels, strict=True):
        encoded = text.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(f"{int(label)}:{len(encoded)}:".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, NDArray[Any]]:
    # No pickle: a cache file must not be able to run code. The zip container's CRC finds flipped bits.
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _write_atomically(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Writes beside the final place and renames, so that a reader or a second process never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _check_training_data(texts: Sequence[str], labels: Sequence[int]) -> None:
    if len(texts) != len(labels):
        raise UserError(f"judge: got {len(texts)} texts and {len(labels)} labels; give one label per text")
    if len(texts) < 20:
        raise UserError(f"judge: got {len(texts)} labelled texts; give at least 20, better thousands")
    seen = {label.item() if isinstance(label, np.generic) else label for label in labels}
    if seen != {0, 1}:
        shown = sorted(map(repr, seen))[:5]
        raise UserError(f"judge: labels are {', '.join(shown)}; use 1 for positive and 0 for negative, both occurring")


def _check_lengths(name: str, prompts: Sequence[str], responses: Sequence[str]) -> None:
    if len(prompts) != len(responses):
        raise UserError(f"judge {name}: got {len(prompts)} prompts and {len(responses)} responses; pair them up")
