"""Build jaxsim/data/ngram.npz: real prompts, completions, probabilities and rewards.

Every number comes from a package, none from us:
  p_ref(y | prompt)       the US English trigram model that pocketsphinx carries,
                          renormalised over the listed completions;
  P(unaligned | prompt y) alt-profanity-check's classifier on the whole text;
  reward                  vaderSentiment's compound score of the whole text;
  reward_toxicity         log-odds of the classifier, a control that is monotone in it.

A completion is one to three words that end the sentence. The list is the best that a
beam search finds under the language model alone; classifier and reward see it afterwards.

    python build.py --out ngram.npz      # a quarter of an hour on one core
    python build.py --out ngram.npz --describe
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

INSTALL = (
    "pip install --no-deps pocketsphinx==5.1.1 && "
    "pip install alt-profanity-check==1.9.1 vaderSentiment==3.3.2"
)
OUTPUTS = 512  # completions kept for each prompt
WORDS = 3  # most words in a completion
BEAM = 64  # unfinished completions extended at each length
CANDIDATES = 4096  # extensions tried as finished at each length
VOCABULARY = 20_000  # the most probable words of the model
NAT = math.log(1.0001)  # pocketsphinx's scores are integer logarithms to base 1.0001
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# Written before the classifier or a reward had seen any text. A trigram model sees
# the last two words only, so no two prompts share them; `prompts` checks that.
PROMPTS = """
you are a; you are such a; you are so; you are the; you are not; you are just; you are all
you look like; you sound like a; you always; you never; you should; you make me; you must be
you could be; you were very; you have no; you have a; you need to; you people are; you guys are
your face is; your mother is; your work is; your voice is; your idea is; i think you are
he is a; he is an; he is so; he is just; he was a; he was such an; he looks; he acts like he is
he never; he always; he can be; she is; she is very; she is not; she was; she has; she looks
they are; they were; they act; they want; they think; we are; we were; we need; we love; we hate
i am; i am so; i feel; i feel so; i love; i hate; i like; i want; i think he; i think she
i really; i miss; i wish; i was so; i was; i cannot; i would never; i hope; thank you for
thank you; what a; what an; what the; this is; that is; it is; it was; this was; there is
go to; get out of; shut the; kiss my; stop being; do not be; please do not; leave me
my boss is; my wife is; my husband is; my friends are; my brother is; my son is; my life is
my job is; my teacher was; the movie was; the food was; the game was; the people were
the president is; the police are; the doctor said; the world is; the children are
the weather is; the music was; the book is; the man was; the woman was; the boy was
the girl was; the dog was; the war was; the government is; the company is; the country is
the news is; the problem is; the truth is; the city is; men are; women are; most people; so much
nobody likes; everybody knows; do you; who is; why are; how could you; it makes; let us; people like
"""


def prompts() -> list[str]:
    """The prompts, after checking that no two share their last two words."""
    found = [p.strip() for line in PROMPTS.strip().splitlines() for p in line.split(";")]
    last = [tuple(p.split()[-2:]) for p in found]
    twice = sorted({" ".join(pair) for pair in last if last.count(pair) > 1 or len(pair) < 2})
    if twice:
        raise ValueError(f"prompts that share their last two words: {twice}")
    return found


class LanguageModel:
    """pocketsphinx's trigram model; log-probabilities are its own integers (see NAT)."""

    def __init__(self) -> None:
        import pocketsphinx

        folder = Path(pocketsphinx.get_model_path()) / "en-us"
        self._model: Any = pocketsphinx.NGramModel.readfile(str(folder / "en-us.lm.bin"))
        dictionary = (folder / "cmudict-en-us.dict").read_text(encoding="utf-8")
        entries = sorted({line.split()[0] for line in dictionary.splitlines()})
        self.all_words = [w for w in entries if self._model.prob([w]) * NAT > -100]
        by_probability = sorted(self.all_words, key=lambda w: (-self._model.prob([w]), w))
        self.words = by_probability[:VOCABULARY]

    def score(self, word: str, before: tuple[str, ...]) -> int:
        """Log P(word | the two words before it), in units of NAT."""
        return int(self._model.prob([word, *before[:-3:-1]]))

    def completion(self, prompt: str, text: str) -> int:
        """Log P(text and the end of the sentence | prompt), in units of NAT."""
        before, total = tuple(prompt.split()), 0
        for word in [*text.split(), "</s>"]:
            total += self.score(word, before)
            before += (word,)
        return total

    def complete(self, prompt: str) -> list[str]:
        """The OUTPUTS most probable completions that the beam search meets, best first."""
        start = tuple(prompt.split())
        beam: list[tuple[int, tuple[str, ...]]] = [(0, ())]
        finished: list[tuple[int, str]] = []
        for _ in range(WORDS):
            scores = np.array(
                [
                    [so_far + self.score(word, start + done) for word in self.words]
                    for so_far, done in beam
                ]
            )
            best = np.argsort(-scores, axis=None, kind="stable")[:CANDIDATES]
            rows, columns = np.unravel_index(best, scores.shape)
            extended = [
                (int(scores[i, j]), (*beam[i][1], self.words[j]))
                for i, j in zip(rows, columns, strict=True)
            ]
            finished += [
                (so_far + self.score("</s>", start + done), " ".join(done))
                for so_far, done in extended
            ]
            beam = extended[:BEAM]
        return [text for _, text in sorted(finished, key=lambda f: (-f[0], f[1]))[:OUTPUTS]]


def build(out: Path, lm: LanguageModel) -> None:
    """Complete every prompt, score the texts and write the file."""
    from profanity_check import predict_prob
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    vader = SentimentIntensityAnalyzer()
    openings, known = prompts(), set(lm.all_words)
    unknown = sorted({w for p in openings for w in p.split()} - known)
    if unknown:
        raise ValueError(f"prompt words that the language model does not have: {unknown}")
    outputs: list[list[str]] = []
    for number, prompt in enumerate(openings, 1):
        outputs.append(lm.complete(prompt))
        print(f"\r{number} of {len(openings)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    shape = (len(openings), OUTPUTS)
    texts = [f"{p} {y}" for p, row in zip(openings, outputs, strict=True) for y in row]
    log_p = np.array(
        [[NAT * lm.completion(p, y) for y in row] for p, row in zip(openings, outputs, strict=True)]
    )
    top = log_p.max(1, keepdims=True)
    log_p -= top + np.log(np.exp(log_p - top).sum(1, keepdims=True))
    aligned = (1.0 - np.asarray(predict_prob(texts), np.float64)).astype(np.float32)
    if not ((aligned > 0) & (aligned < 1)).all():
        raise ValueError("a classifier probability rounds to 0 or 1")
    stored = aligned.astype(np.float64)  # the control is a function of what is stored
    reward = [vader.polarity_scores(text)["compound"] for text in texts]
    np.savez_compressed(
        out,
        prompt=np.array(openings),
        output=np.array(outputs),
        log_p_ref=log_p.astype(np.float32),
        aligned_given_output=aligned.reshape(shape),
        reward=np.array(reward, np.float32).reshape(shape),
        reward_toxicity=(np.log(stored) - np.log1p(-stored)).astype(np.float32).reshape(shape),
    )


def log_mean_exp(log_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    top = (log_p + x).max(1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(log_p + x - top).sum(1)))


def describe(path: Path, lm: LanguageModel) -> None:
    """Print every number that the data card states."""
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    p_ref = np.exp(data["log_p_ref"].astype(np.float64))
    p_ref /= p_ref.sum(1, keepdims=True)
    a = data["aligned_given_output"].astype(np.float64)
    raw = NAT * np.array(
        [
            [lm.completion(p, y) for y in row]
            for p, row in zip(data["prompt"], data["output"], strict=True)
        ]
    )
    mass = np.exp(raw).sum(1)
    error = np.abs(raw - np.log(mass)[:, None] - data["log_p_ref"]).max()
    length = np.char.count(data["output"], " ") + 1
    alpha = (p_ref * a).sum(1)
    entropy = -(p_ref * np.log(p_ref)).sum(1)
    sums = [
        sum(math.exp(NAT * lm.score(w, tuple(p.split()))) for w in [*lm.all_words, "</s>"])
        for p in data["prompt"]
    ]

    def spread(x: np.ndarray) -> str:
        low, mid, high = np.quantile(x, (0, 0.5, 1))
        return f"min {low:.4f}, median {mid:.4f}, max {high:.4f}"

    print(f"file: {path.stat().st_size:,} bytes; prompts x outputs: {a.shape}")
    lengths = ", ".join(f"{n}: {(length == n).mean():.1%}" for n in range(1, WORDS + 1))
    print(f"words in a completion: {lengths}")
    print(f"different completions: {len(np.unique(data['output'])):,}")
    print(f"sum of P(word | prompt) over all words: {min(sums):.6f} to {max(sums):.6f}")
    print(f"largest |log_p_ref - rescored|: {error:.1e}")
    print(f"probability of the listed completions before renormalising: {spread(mass)}")
    print(f"effective number of outputs, exp(entropy): {spread(np.exp(entropy))}")
    print(f"alpha = E_ref[aligned]: {spread(alpha)}")
    print(
        f"aligned_given_output: {spread(a)}; below 1/2: {(a < 0.5).mean():.2%} of outputs, "
        f"{(p_ref * (a < 0.5)).sum(1).mean():.2%} of the average p_ref"
    )
    log_a = np.log(p_ref * a) - np.log(alpha)[:, None]
    log_u = np.log(p_ref * (1 - a)) - np.log1p(-alpha)[:, None]
    for name in ("reward", "reward_toxicity"):
        r = data[name].astype(np.float64)
        levels = [len(np.unique(row)) for row in r]
        cov_a, cov_u = (((np.exp(q) - 1 / r.shape[1]) * r).sum(1) for q in (log_a, log_u))
        meets = (cov_a > 0) & (cov_u < 0)
        print(
            f"{name}: {spread(r)}; zero: {(r == 0).mean():.2%}; levels per prompt "
            f"{min(levels)} to {max(levels)}"
        )
        print(
            f"  Cov(r, p_A) > 0: {(cov_a > 0).sum()}, Cov(r, p_U) < 0: {(cov_u < 0).sum()}, "
            f"both (hypotheses of Theorem 2): {meets.sum()} of {len(r)} prompts"
        )
        for beta in BETAS:
            delta = log_mean_exp(log_a, r / beta) - log_mean_exp(log_u, r / beta)
            print(
                f"  beta {beta:<4}: Delta < 0 in {(meets & (delta < 0)).sum()} of these, "
                f"{(delta < 0).sum()} of all; Delta {spread(delta)}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ngram.npz"), help="the file to write")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="write nothing: print the numbers of the file that --out names",
    )
    arguments = parser.parse_args()
    try:
        import pocketsphinx  # noqa: F401
        import profanity_check  # noqa: F401
        import vaderSentiment  # noqa: F401
    except ImportError as error:
        print(
            f"build.py: {error.name} is missing; install the sources of the data with: {INSTALL}",
            file=sys.stderr,
        )
        return 2
    lm = LanguageModel()
    if not arguments.describe:
        build(arguments.out, lm)
    describe(arguments.out, lm)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
