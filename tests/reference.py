"""Independent reference for the closed form, written from the paper and from nothing else.

Nothing here imports the package under test. Three layers:

* `exact` and `condition_numbers`: one instance in mpmath, with the accuracy that can be asked
  of a floating-point evaluation of it; `exact_signs` decides the verdicts; `exact_objective` and
  its neighbours do the same for functions of a policy.
* `tilt_numpy`: the paper's formulas on batches in plain NumPy float64, for quick cross-checks.
* `tilted_masses`, `exact_log_odds_shift`: rational instances (`fractions.Fraction`), where only
  the exponential is not a fraction.

Notation: A, U are the aligned and unaligned components, ref their mixture (eq. 2), p* the optimum
of eq. (1), Z its partition function, s = 1/beta, t_i = (r_i - m)/beta with m = E_ref[r].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from mpmath import mp, mpf
from numpy.typing import ArrayLike, NDArray

SCALAR_FIELDS = (
    "log_z",
    "log_tpm_aligned",
    "log_tpm_unaligned",
    "log_odds_shift",
    "kl",
    "expected_reward",
    "objective",
)
COVARIANCE_FIELDS = ("covariance_aligned", "covariance_unaligned")

Reals = list[mpf]


@dataclass(frozen=True, kw_only=True)
class Exact:
    """One instance in high precision; lists run over `support`, the outputs with p_ref > 0."""

    digits: int
    support: list[int]
    # The fields of Evaluation.
    log_z: mpf
    log_tpm_aligned: mpf
    log_tpm_unaligned: mpf
    log_odds_shift: mpf
    kl: mpf
    expected_reward: mpf
    objective: mpf
    # Theorem 2: covariance under the uniform distribution on the support, and the means.
    covariance_aligned: mpf
    covariance_unaligned: mpf
    mean_aligned: mpf
    mean_unaligned: mpf
    mean_reference: mpf
    mean_uniform: mpf
    # Per output.
    log_p_star: Reals
    log_weight_aligned: Reals
    log_weight_unaligned: Reals
    log_p_ref: Reals
    p_star: Reals
    p_ref: Reals
    p_aligned: Reals
    p_unaligned: Reals
    log_p_aligned: list[mpf | None]
    log_p_unaligned: list[mpf | None]
    tilted_aligned: Reals
    tilted_unaligned: Reals
    centred: Reals  # t_i = (r_i - m) / beta
    log_ratio: Reals  # u_i = log p*_i / p_ref_i
    deviation: Reals  # r_i - c, exact, with c the reward of the likeliest output
    deviation_star: Reals  # r_i - E_*[r], formed from differences to the mode of p*
    centre: mpf
    # Scalars of the instance.
    beta: mpf
    logit_alpha: mpf
    log_alpha: mpf
    log_not_alpha: mpf
    range_over_beta: mpf


def _exp_remainder(t: mpf, exp_t: mpf) -> mpf:
    """e^t - 1 - t >= 0: a series below 1e-9, where the subtraction would lose 18 digits."""
    if abs(t) > 1e-9:
        return exp_t - 1 - t
    return t * t * (mpf(1) / 2 + t * (mpf(1) / 6 + t * (mpf(1) / 24 + t / 120)))


def _bregman(u: mpf, exp_u: mpf) -> mpf:
    """U e^u - e^u + 1 >= 0, so that KL(p||q) = sum q bregman(log p/q) has no cancellation."""
    if abs(u) > 1e-9:
        return u * exp_u - exp_u + 1
    return u * u * (mpf(1) / 2 + u * (mpf(1) / 3 + u * (mpf(1) / 8 + u / 30)))


def _component(stored: Sequence[float]) -> tuple[Reals, list[mpf | None]]:
    """Probabilities and log-probabilities of one component, normalised exactly."""
    logs = [None if x == -np.inf else mpf(x) for x in stored]
    masses = [mpf(0) if x is None else mp.exp(x) for x in logs]
    total = mp.fsum(masses)
    log_total = mp.log(total)
    inverse = 1 / total
    return [x * inverse for x in masses], [None if x is None else x - log_total for x in logs]


def exact(
    log_p_aligned: ArrayLike,
    log_p_unaligned: ArrayLike,
    reward: ArrayLike,
    logit_alpha: ArrayLike,
    beta: ArrayLike,
    digits: int = 50,
) -> Exact:
    """Evaluate one instance, its stored floats taken as exact binary numbers.

    Components are normalised exactly; -inf is zero mass; outputs with p_ref = 0 are dropped.
    Every sum that may cancel is arranged so that 50 digits leave at least 25 correct ones from
    r/beta = 1e-8 (where the KL loses 16) to 1e4, and with masses down to e^-700:
    log Z - m/beta = log1p(sum p_ref (e^t - 1 - t)) and KL = sum p_ref (u e^u - e^u + 1) are sums
    of non-negative terms, and t is formed from differences to a stored reward.
    """
    lpa = np.asarray(log_p_aligned).astype(np.float64).tolist()
    lpu = np.asarray(log_p_unaligned).astype(np.float64).tolist()
    rewards = np.asarray(reward).astype(np.float64).tolist()
    support = [i for i in range(len(rewards)) if lpa[i] != -np.inf or lpu[i] != -np.inf]
    stored = [rewards[i] for i in support]
    with mp.workdps(digits):
        b = mpf(float(np.asarray(beta)))
        logit = mpf(float(np.asarray(logit_alpha)))
        pa, log_pa = _component([lpa[i] for i in support])
        pu, log_pu = _component([lpu[i] for i in support])
        alpha, one_minus_alpha = 1 / (1 + mp.exp(-logit)), 1 / (1 + mp.exp(logit))
        pr = [alpha * x + one_minus_alpha * y for x, y in zip(pa, pu, strict=True)]
        log_pr = [mp.log(x) for x in pr]

        # Everything that depends on the reward alone is computed once per distinct reward.
        centre = stored[max(range(len(pr)), key=pr.__getitem__)]
        c = mpf(centre)
        levels = {r: mpf(r) - c for r in dict.fromkeys(stored)}
        dev = [levels[r] for r in stored]
        shift = mp.fdot(pr, dev)  # m - c
        tilt, tilt_minus_1, t_of, exp_t, remainder = {}, {}, {}, {}, {}
        rescale = mp.exp(-shift / b)
        for r, d in levels.items():
            x = d / b
            tilt[r] = mp.exp(x)
            tilt_minus_1[r] = x + _exp_remainder(x, tilt[r])
            t_of[r] = (d - shift) / b
            exp_t[r] = tilt[r] * rescale
            remainder[r] = _exp_remainder(t_of[r], exp_t[r])
        weights = [tilt[r] for r in stored]
        za, zu = mp.fdot(pa, weights), mp.fdot(pu, weights)
        ratio = za / zu
        if 0.5 < ratio < 2:
            gap = mp.fdot((x - y for x, y in zip(pa, pu, strict=True)),
                          (tilt_minus_1[r] for r in stored))  # fmt: skip
            delta = mp.log1p(gap / zu)
        else:
            delta = mp.log(ratio)
        log_zc = mp.log1p(mp.fdot(pr, (remainder[r] for r in stored)))
        scale = mp.exp(-log_zc)
        u_of = {r: t - log_zc for r, t in t_of.items()}
        exp_u = {r: x * scale for r, x in exp_t.items()}
        breg = {r: _bregman(u, exp_u[r]) for r, u in u_of.items()}
        p_star = [x * exp_u[r] for x, r in zip(pr, stored, strict=True)]
        mode = max(range(len(pr)), key=p_star.__getitem__)
        below_mode = mp.fdot(p_star, (d - dev[mode] for d in dev))
        u = [u_of[r] for r in stored]
        log_z = (c + shift) / b + log_zc
        logit_tpm = logit + delta
        log_alpha, log_not_alpha = -mp.log1p(mp.exp(-logit)), -mp.log1p(mp.exp(logit))
        k = len(support)
        mean_dev = mp.fsum(dev) / k
        dev_a, dev_u = mp.fdot(pa, dev), mp.fdot(pu, dev)
        return Exact(
            digits=digits,
            support=support,
            log_z=log_z,
            log_tpm_aligned=-mp.log1p(mp.exp(-logit_tpm)),
            log_tpm_unaligned=-mp.log1p(mp.exp(logit_tpm)),
            log_odds_shift=delta,
            kl=mp.fdot(pr, (breg[r] for r in stored)),
            expected_reward=(c + dev[mode]) + below_mode,
            objective=b * log_z,
            covariance_aligned=(dev_a - mean_dev) / k,
            covariance_unaligned=(dev_u - mean_dev) / k,
            mean_aligned=c + dev_a,
            mean_unaligned=c + dev_u,
            mean_reference=c + shift,
            mean_uniform=c + mean_dev,
            log_p_star=[x + y for x, y in zip(log_pr, u, strict=True)],
            log_weight_aligned=[log_alpha + x for x in u],
            log_weight_unaligned=[log_not_alpha + x for x in u],
            log_p_ref=log_pr,
            p_star=p_star,
            p_ref=pr,
            p_aligned=pa,
            p_unaligned=pu,
            log_p_aligned=log_pa,
            log_p_unaligned=log_pu,
            tilted_aligned=[x * w / za for x, w in zip(pa, weights, strict=True)],
            tilted_unaligned=[x * w / zu for x, w in zip(pu, weights, strict=True)],
            centred=[t_of[r] for r in stored],
            log_ratio=u,
            deviation=dev,
            deviation_star=[(d - dev[mode]) - below_mode for d in dev],
            centre=c,
            beta=b,
            logit_alpha=logit,
            log_alpha=log_alpha,
            log_not_alpha=log_not_alpha,
            range_over_beta=(max(dev) - min(dev)) / b,
        )


def _abs_fdot(p: Reals, x: Reals) -> mpf:
    return mp.fdot(p, (abs(v) for v in x))


def _tilt_distance(tilted: Reals, p: Reals, log_p: list[mpf | None]) -> mpf:
    """Sum |p_s - p| |log p| over the component's own support."""
    return mp.fsum(
        abs(a - b) * abs(c) for a, b, c in zip(tilted, p, log_p, strict=True) if c is not None
    )


def condition_numbers(e: Exact, unit: float) -> dict[str, Any]:
    """Kappa of every field: the promise is |x_hat - x| <= 8 u (kappa_x + |x|), u = `unit`.

    A careful evaluation rounds the intermediate quantities log p_i (by u |log p_i|, and then u
    relative in p_i) and t_i = (r_i - m)/beta (by u |t_i|). Kappa is the first-order effect of
    such perturbations, their sizes added. With R = (r_max - r_min)/beta on the support, p_{A,s}
    the tilted component, x = E_*[r], u_i = log p*_i/p_ref_i = t_i - log Z_c, and eps_i, delta_i
    the perturbations of t_i, and of log p_i:

    log_odds_shift
        d log E_A e^t = sum p_{A,s,i} eps_i, and, with the component normalised,
        sum (p_{A,s,i} - p_{A,i}) delta_i; |p_{A,s} - p_A|_1 <= 2 min(1, R) for the u in p_i:
        (E_{A,s} + E_{U,s})|t| + sum |p_{A,s} - p_A||log p_A| + same for U + min(1, R).
    log_z
        log Z = m/beta + log E_ref e^t, by the same steps:
        |m|/beta + E_*|t| + sum |p* - p_ref||log p_ref| + min(1, R). Objective: beta times it.
    log_tpm_aligned, log_tpm_unaligned
        The logit l = logit alpha + Delta has the error of Delta and one rounding:
        d log sigma(l) = TPM(U) dl, and d log sigma(-l) = -TPM(A) dl, so
        TPM(other) (kappa_Delta + |Delta| + |l|).
    kl
        From t: dp*_i = p*_i (eps_i - E_* eps), sum p* du = 0: sum p*_i (u_i - KL) eps_i.
        From p_ref: du_i = E_ref delta - E_* delta and dp*_i = p*_i (delta_i - E_* delta):
        sum (p*_i (u_i - KL) - p*_i + p_ref_i) delta_i. With |delta_i| <= 1 + |log p_ref_i|:
        sum p* |u - KL||t| + sum |p* (u - KL) - p* + p_ref| (1 + |log p_ref|), to which comes
        the second order 4 u min(1, R)^2: KL = sum p_ref phi(u_i), phi(u) ~ u^2/2, and log Z_c,
        the logarithm of a sum near one, is promised to 8 u min(1, R) only: (8 u)^2/2 = 8 u 4 u.
    expected_reward
        x = sum p* r, so dx = sum p*_i (r_i - x)(eps_i + delta_i): the reward itself is stored,
        and the sum, taken about a centre near x, rounds by u E_*|r - x|:
        sum p* |r - x| (1 + |t| + |log p_ref|). (Not |p* - p_ref||r - x|: that is the
        sensitivity of x - m only; and with r stored no |m| enters.)
    covariance_aligned, covariance_unaligned
        (E_A[r] - r_bar)/k with k outputs in the support. Nothing is tilted, so p_A = e^{log p_A}
        (stored) is good to a few u, and both means are taken of r - c about a centre c ~ r_bar,
        which cancels: (E_A|r - r_bar| + mean|r - r_bar|)/k.
    log_p_star (a list)
        log p*_i = log p_ref_i + t_i - log Z_c, an increment of which is
        (1 - p*_i)(eps_i + delta_i) - sum_{j != i} p*_j (eps_j + delta_j); a log-probability
        is not promised below u itself, so
        (1 - p*_i)(|t_i| + |log p_ref_i|) + sum_{j != i} p*_j (|t_j| + |log p_ref_j|) + 1.
    log_weight_aligned, log_weight_unaligned (lists)
        Lemma 1: log alpha_A(y_i) = log alpha + u_i. The logarithm of alpha has one rounding;
        u_i = t_i - log E_ref e^t moves by (1 - p*_i) eps_i - sum_{j != i} p*_j eps_j with the t,
        and with the p_ref, normalised, as log Z does:
        |log alpha| + (1 - p*_i)|t_i| + sum_{j != i} p*_j |t_j| + sum |p* - p_ref||log p_ref|
        + min(1, R).
    """
    with mp.workdps(20):
        ps, pr, t, lr, u = e.p_star, e.p_ref, e.centred, e.log_p_ref, e.log_ratio
        one = mpf(1)
        saturated = min(one, e.range_over_beta)
        shift = abs(e.log_odds_shift)
        kappa_shift = (
            _abs_fdot(e.tilted_aligned, t)
            + _abs_fdot(e.tilted_unaligned, t)
            + _tilt_distance(e.tilted_aligned, e.p_aligned, e.log_p_aligned)
            + _tilt_distance(e.tilted_unaligned, e.p_unaligned, e.log_p_unaligned)
            + saturated
        )
        mean_t = _abs_fdot(ps, t)
        reference_moves = mp.fsum(abs(a - b) * abs(c) for a, b, c in zip(ps, pr, lr, strict=True))
        kappa_z = abs(e.mean_reference) / e.beta + mean_t + reference_moves + saturated
        logit_error = kappa_shift + shift + abs(e.logit_alpha + e.log_odds_shift)
        kl = e.kl
        kappa_kl = 4 * unit * saturated**2 + mp.fsum(
            p * abs(v - kl) * abs(w) + abs(p * (v - kl) - p + q) * (1 + abs(c))
            for p, q, v, w, c in zip(ps, pr, u, t, lr, strict=True)
        )
        size = [abs(w) + abs(c) for w, c in zip(t, lr, strict=True)]
        kappa_reward = mp.fsum(
            p * abs(d) * (1 + s) for p, d, s in zip(ps, e.deviation_star, size, strict=True)
        )
        mean_size = mp.fdot(ps, size)
        kappa_ratio = [
            (1 - p) * abs(w) + (mean_t - p * abs(w)) + reference_moves + saturated
            for p, w in zip(ps, t, strict=True)
        ]
        return {
            "log_odds_shift": kappa_shift,
            "log_z": kappa_z,
            "objective": e.beta * kappa_z,
            "log_tpm_aligned": mp.exp(e.log_tpm_unaligned) * logit_error,
            "log_tpm_unaligned": mp.exp(e.log_tpm_aligned) * logit_error,
            "kl": kappa_kl,
            "expected_reward": kappa_reward,
            "covariance_aligned": _kappa_covariance(e, e.p_aligned),
            "covariance_unaligned": _kappa_covariance(e, e.p_unaligned),
            "log_p_star": [
                1 + (1 - p) * s + (mean_size - p * s) for p, s in zip(ps, size, strict=True)
            ],
            "log_weight_aligned": [x - e.log_alpha for x in kappa_ratio],
            "log_weight_unaligned": [x - e.log_not_alpha for x in kappa_ratio],
        }


def _kappa_covariance(e: Exact, p: Reals) -> mpf:
    k = len(p)
    mean = mp.fsum(e.deviation) / k
    distance = [abs(d - mean) for d in e.deviation]
    return (mp.fdot(p, distance) + mp.fsum(distance) / k) / k


def underflow_floors(e: Exact, tiny: float) -> dict[str, mpf]:
    """What a mass below the smallest normal number, flushed to zero, may cost in each field."""
    base = len(e.support) * mpf(tiny)
    spread = base * max(mpf(1), e.range_over_beta * e.beta)
    floors = dict.fromkeys(("log_z", "log_tpm_aligned", "log_tpm_unaligned"), base)
    floors |= {"log_odds_shift": base, "kl": base * (1 + e.range_over_beta)}
    floors |= dict.fromkeys(("expected_reward", *COVARIANCE_FIELDS), spread)
    return floors | {"objective": base * max(mpf(1), e.beta)}


@dataclass(frozen=True, kw_only=True)
class Known:
    """An exact value, its condition number, and what underflow may cost."""

    value: mpf
    kappa: mpf
    floor: mpf


def exact_objective(e: Exact, log_policy: ArrayLike, unit: float, tiny: float) -> Known:
    """L(pi) = E_pi[r] - beta KL(pi || p_ref), pi the stored policy, normalised exactly.

    -inf where the policy has mass outside the support. With v_i = log pi_i/p_ref_i and
    g_i = r_i - m - beta v_i, whose mean under pi is L - m, kappa adds the effects of rounding
    m (|m|); r_i - m (E_pi|r - m|); pi_i, relatively (sum pi_i (g_i - E_pi g) delta_i); v_i, by
    u|v_i| (where v is small the derivative of the Bregman term, pi_i v_i, is small too); and
    log p_ref_i, by u(1 + |log p_ref_i|), p_ref staying normalised:
        |m| + E_pi|r - m| + E_pi|g - E_pi g|
        + beta (E_pi[|v| min(1, |v|)] + sum |pi - p_ref|(1 + |log p_ref|))
    and to second order, as for the KL of the optimum, beta u E_pi (1 + |log pi| + |log p_ref|)^2.
    """
    logs = np.asarray(log_policy).astype(np.float64).tolist()
    inside = set(e.support)
    if any(x != -np.inf for i, x in enumerate(logs) if i not in inside):
        return Known(value=-mp.inf, kappa=mpf(0), floor=mpf(0))
    with mp.workdps(e.digits):
        pi, log_pi = _component([logs[i] for i in e.support])
        size, off_reference, moved, divergence = mpf(0), mpf(0), mpf(0), mpf(0)
        gain: Reals = []
        terms = zip(pi, log_pi, e.p_ref, e.log_p_ref, strict=True)
        m = e.mean_reference - e.centre
        above = [d - m for d in e.deviation]
        for (p, log_p, q, log_q), d in zip(terms, above, strict=True):
            off_reference += abs(p - q) * (1 - log_q)
            if log_p is None:
                gain.append(mpf(0))
                continue
            v = log_p - log_q
            gain.append(d - e.beta * v)
            divergence += p * v
            moved += p * abs(v) * min(mpf(1), abs(v))
            size += p * (1 - log_p - log_q) ** 2
        mean_gain = mp.fdot(pi, gain)
        spread = mp.fdot(pi, (abs(g - mean_gain) for g in gain))
        kappa = abs(e.mean_reference) + _abs_fdot(pi, above) + spread
        kappa += e.beta * (moved + off_reference + unit * size)
        largest = e.range_over_beta + max(abs(x) for x in e.log_p_ref) + 1
        return Known(
            value=e.mean_reference + mean_gain,
            kappa=kappa,
            floor=len(pi) * mpf(tiny) * max(mpf(1), e.beta * largest),
        )


def exact_tpm(e: Exact, log_policy: ArrayLike, tiny: float) -> Known:
    """E_pi[alpha p_A/p_ref] = sum pi_i sigma(l_i), l_i = logit alpha + log p_A,i/p_U,i.

    The sum is over the policy as stored; its mass outside the support counts as zero. Kappa: the
    logarithm of p_A,i/p_U,i is rounded by u times itself, the normalisation of the components
    moves it by u, and the sum l_i is rounded; sigma' = sigma (1 - sigma), which vanishes where one
    component does:
        sum pi_i sigma_i (1 - sigma_i)(1 + |log p_A,i/p_U,i| + |l_i|).
    The relative error of pi_i is that of the result.
    """
    logs = np.asarray(log_policy).astype(np.float64).tolist()
    with mp.workdps(e.digits):
        alpha, not_alpha = mp.exp(e.log_alpha), mp.exp(e.log_not_alpha)
        value, kappa = mpf(0), mpf(0)
        for i, a, u, q, log_a, log_u in zip(
            e.support, e.p_aligned, e.p_unaligned, e.p_ref, e.log_p_aligned, e.log_p_unaligned,
            strict=True,
        ):  # fmt: skip
            if logs[i] == -np.inf:
                continue
            owed = mp.exp(mpf(logs[i])) * alpha * a / q
            value += owed
            if log_a is not None and log_u is not None:
                apart = log_a - log_u
                size = 1 + abs(apart) + abs(e.logit_alpha + apart)
                kappa += owed * (not_alpha * u / q) * size
        return Known(value=value, kappa=kappa, floor=2 * len(e.support) * mpf(tiny))


def exact_kl(log_p: ArrayLike, log_q: ArrayLike, tiny: float, digits: int = 50) -> Known:
    """KL(p || q) = sum (p log(p/q) - p + q) over the stored numbers: KL where both sum to one.

    inf where p has mass that q lacks. Kappa: the logarithms are stored, their difference v_i is
    rounded by u|v_i|, which moves the term by |p_i v_i| u; where |v_i| < 1 it is q phi(v), whose
    derivative p_i v_i makes that p_i v_i^2: E_p[|v| min(1, |v|)]. The relative errors of p and q
    are within those of the terms, none of which is negative.
    """
    pairs = [
        (x, y)
        for x, y in zip(*(np.asarray(z).astype(np.float64).tolist() for z in (log_p, log_q)),
                        strict=True)
        if max(x, y) != -np.inf
    ]  # fmt: skip
    if any(y == -np.inf for _, y in pairs):
        return Known(value=mp.inf, kappa=mpf(0), floor=mpf(0))
    with mp.workdps(digits):
        value, kappa, largest = mpf(0), mpf(0), mpf(0)
        for x, y in pairs:
            q = mp.exp(mpf(y))
            if x == -np.inf:
                value += q
                continue
            v = mpf(x) - mpf(y)
            ratio = mp.exp(v)
            value += q * _bregman(v, ratio)
            kappa += q * ratio * abs(v) * min(mpf(1), abs(v))
            largest = max(largest, abs(v))
        return Known(value=value, kappa=kappa, floor=len(pairs) * mpf(tiny) * (2 + largest))


def exact_take_back(tuned: float, reference: float, a: float, b: float) -> Known:
    """Return a tuned - b reference, whose products are rounded: kappa is the sum of their sizes."""
    with mp.workdps(50):
        kept, taken = mpf(a) * mpf(tuned), mpf(b) * mpf(reference)
        return Known(value=kept - taken, kappa=abs(kept) + abs(taken), floor=mpf(0))


def error_ratio(x_hat: Any, x: mpf, kappa: mpf, unit: float, floor: mpf | float = 0) -> float:
    """|x_hat - x| / (u (kappa + |x|)) after an absolute allowance; infinite if x_hat is not finite.

    The promise is a ratio of at most 8. Zero error is ratio zero even where kappa + |x| = 0, and an
    infinite x must be met exactly.
    """
    value = float(x_hat)
    if mp.isinf(x):
        return 0.0 if value == float(x) else float("inf")
    if not np.isfinite(value):
        return float("inf")
    with mp.workdps(50):
        excess = abs(mpf(value) - x) - floor
        if excess <= 0:
            return 0.0
        allowed = unit * (kappa + abs(x))
        return float(excess / allowed) if allowed else float("inf")


def exact_signs(
    e: Exact,
    log_p_aligned: ArrayLike,
    log_p_unaligned: ArrayLike,
    reward: ArrayLike,
    beta: ArrayLike,
) -> dict[str, int | None]:
    """Signs (-1, 0, 1) of the log-odds shift and of both covariances; None where undecided.

    A value far above the working precision gives its own sign. Otherwise exact ties are decided
    on the stored numbers: by Lindemann-Weierstrass, exponentials of distinct rationals are
    linearly independent, so Delta = 0 iff the multisets {a_i + r_i/beta + b_j} and
    {b_i + r_i/beta + a_j} of stored log-probabilities coincide, and a covariance is zero iff
    sum (r_i - r_bar) = 0 over every class of outputs of equal stored log-probability.
    """
    small = mpf(10) ** (10 - e.digits)
    lpa, lpu = _stored(log_p_aligned, e.support), _stored(log_p_unaligned, e.support)
    rewards = _stored(reward, e.support)
    b = Fraction(float(np.asarray(beta)))
    with mp.workdps(e.digits):
        scale_shift = _abs_fdot(e.tilted_aligned, e.centred)
        scale_shift = min(mpf(1), scale_shift + _abs_fdot(e.tilted_unaligned, e.centred))
        scale_cov = max(map(abs, e.deviation)) / len(e.support)
        signs: dict[str, int | None] = {"log_odds_shift": _sign(e.log_odds_shift)}
        if abs(e.log_odds_shift) <= small * scale_shift:
            signs["log_odds_shift"] = 0 if _is_shift_tie(lpa, lpu, rewards, b) else None
        for field, logs in zip(COVARIANCE_FIELDS, (lpa, lpu), strict=True):
            value = getattr(e, field)
            signs[field] = _sign(value)
            if abs(value) <= small * scale_cov:
                signs[field] = 0 if _is_covariance_tie(logs, rewards) else None
    return signs


def _stored(x: ArrayLike, support: list[int]) -> list[float]:
    values = np.asarray(x).astype(np.float64).tolist()
    return [values[i] for i in support]


def _sign(x: mpf) -> int:
    return int(x > 0) - int(x < 0)


def _is_shift_tie(lpa: list[float], lpu: list[float], rewards: list[float], beta: Fraction) -> bool:
    if len(set(rewards)) == 1:
        return True
    # Per component: how often each (log-probability, reward) and each log-probability occurs.
    a = Counter((x, r) for x, r in zip(lpa, rewards, strict=True) if x != -np.inf)
    b = Counter((x, r) for x, r in zip(lpu, rewards, strict=True) if x != -np.inf)
    if a == b:
        return True
    exponents: Counter[Fraction] = Counter()
    for tilted, plain, sign in ((a, b, 1), (b, a, -1)):
        logs: Counter[float] = Counter()
        for (x, _), count in plain.items():
            logs[x] += count
        offsets = [(Fraction(x), count) for x, count in logs.items()]
        for (x, r), count in tilted.items():
            exponent = Fraction(x) + Fraction(r) / beta
            for y, other in offsets:
                exponents[exponent + y] += sign * count * other
    return not any(exponents.values())


def _is_covariance_tie(logs: list[float], rewards: list[float]) -> bool:
    mean = sum(map(Fraction, rewards), Fraction(0)) / len(rewards)
    classes: dict[float, Fraction] = {}
    for x, r in zip(logs, rewards, strict=True):
        if x != -np.inf:
            classes[x] = classes.get(x, Fraction(0)) + Fraction(r) - mean
    return not any(classes.values())


def tilt_numpy(
    log_p_aligned: ArrayLike,
    log_p_unaligned: ArrayLike,
    reward: ArrayLike,
    logit_alpha: ArrayLike,
    beta: ArrayLike,
) -> dict[str, NDArray[np.float64]]:
    """Follow the paper in float64 over the last axis; leading axes are a batch.

    Straightforward, hence accurate only where r/beta is of ordinary size.
    """
    lpa, lpu, r = (np.asarray(x, np.float64) for x in (log_p_aligned, log_p_unaligned, reward))
    b = np.asarray(beta, np.float64)[..., None]
    logit = np.asarray(logit_alpha, np.float64)[..., None]
    alpha, not_alpha = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))
    pa, pu = np.exp(lpa), np.exp(lpu)
    pa, pu = pa / pa.sum(-1, keepdims=True), pu / pu.sum(-1, keepdims=True)
    ref = alpha * pa + not_alpha * pu  # eq. (2)
    top = np.max(np.where(ref > 0, r, -np.inf), axis=-1, keepdims=True)
    tilt = np.where(ref > 0, np.exp(np.minimum(r - top, 0) / b), 0)
    z = (ref * tilt).sum(-1, keepdims=True)
    p_star = ref * tilt / z
    tpm_aligned = (alpha * tilt * pa / z).sum(-1)
    tpm_unaligned = (not_alpha * tilt * pu / z).sum(-1)
    count = (ref > 0).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p_star = np.log(p_star)
        kl = np.where(p_star > 0, p_star * (log_p_star - np.log(ref)), 0).sum(-1)
    log_z = (np.log(z) + top / b)[..., 0]
    mean = np.where(ref > 0, r, 0).sum(-1) / count
    return {
        "log_z": log_z,
        "log_tpm_aligned": np.log(tpm_aligned),
        "log_tpm_unaligned": np.log(tpm_unaligned),
        "log_odds_shift": np.log((pa * tilt).sum(-1)) - np.log((pu * tilt).sum(-1)),
        "kl": kl,
        "expected_reward": (p_star * r).sum(-1),
        "objective": b[..., 0] * log_z,
        "covariance_aligned": ((pa * r).sum(-1) - mean) / count,
        "covariance_unaligned": ((pu * r).sum(-1) - mean) / count,
        "log_p_star": log_p_star,
    }


def tilted_masses(
    p: Sequence[Fraction | int], reward: Sequence[Fraction | int], s: Fraction | int = 1
) -> dict[Fraction, Fraction]:
    """E_p[e^{s r}] as exact coefficients {exponent: coefficient}, zero coefficients dropped."""
    terms: dict[Fraction, Fraction] = {}
    for mass, r in zip(p, reward, strict=True):
        exponent = Fraction(s) * Fraction(r)
        terms[exponent] = terms.get(exponent, Fraction(0)) + Fraction(mass)
    return {k: v for k, v in terms.items() if v}


def exact_log_odds_shift(
    p_aligned: Sequence[Fraction | int],
    p_unaligned: Sequence[Fraction | int],
    reward: Sequence[Fraction | int],
    s: Fraction | int = 1,
    digits: int = 50,
) -> mpf:
    """Delta(s) of a rational instance; exactly zero if and only if it is a tie."""
    a, u = tilted_masses(p_aligned, reward, s), tilted_masses(p_unaligned, reward, s)
    if a == u:
        return mpf(0)
    with mp.workdps(digits):
        value = [
            mp.fsum(mpf(v.numerator) / v.denominator * mp.exp(mpf(k.numerator) / k.denominator)
                    for k, v in terms.items())
            for terms in (a, u)
        ]  # fmt: skip
        return mp.log(value[0] / value[1])


def exact_covariance(p: Sequence[Fraction | int], reward: Sequence[Fraction | int]) -> Fraction:
    """Covariance of r and p under the uniform distribution on the outputs given."""
    k = len(reward)
    mean_r = sum(map(Fraction, reward), Fraction(0)) / k
    mean_p = sum(map(Fraction, p), Fraction(0)) / k
    pairs = zip(p, reward, strict=True)
    return sum(((r - mean_r) * (q - mean_p) for q, r in pairs), Fraction(0)) / k


# Both hypotheses of Theorem 2 hold, and TPM(A) < alpha for every alpha: E_A e^r = e^3 lies below
# E_U e^r = (1 + e^4)/2 at beta = 1. The order flips where x = e^{1/beta} solves x^3 = (1 + x^4)/2.
COUNTEREXAMPLE: dict[str, tuple[Fraction, ...]] = {
    "p_aligned": (Fraction(0), Fraction(1), Fraction(0)),
    "p_unaligned": (Fraction(1, 2), Fraction(0), Fraction(1, 2)),
    "reward": (Fraction(0), Fraction(3), Fraction(4)),
}
