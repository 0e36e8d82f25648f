"""jaxsim: exact, vectorised simulation of what preference tuning does to an output distribution.

Names are imported on first use, so that `import jaxsim` alone loads no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsim.decoding import take_back_logits as take_back_logits
    from jaxsim.descent import Solution as Solution
    from jaxsim.descent import Status as Status
    from jaxsim.descent import natural_gradient as natural_gradient
    from jaxsim.engine.lift import best_of_n as best_of_n
    from jaxsim.engine.lift import conditions as conditions
    from jaxsim.engine.lift import evaluate as evaluate
    from jaxsim.engine.lift import evaluate_grid as evaluate_grid
    from jaxsim.engine.lift import mixture_weights as mixture_weights
    from jaxsim.engine.lift import objective as objective
    from jaxsim.engine.lift import optimal_policy as optimal_policy
    from jaxsim.engine.lift import sufficient_beta as sufficient_beta
    from jaxsim.engine.lift import theorem2 as theorem2
    from jaxsim.engine.lift import tpm as tpm
    from jaxsim.engine.lift import tpm_bounds as tpm_bounds
    from jaxsim.engine.loop import solve as solve
    from jaxsim.engine.search import Counterexample as Counterexample
    from jaxsim.engine.search import find_counterexample as find_counterexample
    from jaxsim.engine.simulate import Simulation as Simulation
    from jaxsim.engine.simulate import simulate as simulate
    from jaxsim.engine.tiles import sample_instances as sample_instances
    from jaxsim.families.spec import Components as Components
    from jaxsim.families.spec import Family as Family
    from jaxsim.families.spec import Rewards as Rewards
    from jaxsim.families.spec import Scalar as Scalar
    from jaxsim.feedback import Feedback as Feedback
    from jaxsim.feedback import FittedReward as FittedReward
    from jaxsim.feedback import expected_pairs as expected_pairs
    from jaxsim.feedback import expected_rankings as expected_rankings
    from jaxsim.feedback import expected_thumbs as expected_thumbs
    from jaxsim.feedback import fit_reward as fit_reward
    from jaxsim.feedback import sample_feedback as sample_feedback
    from jaxsim.grid import Grid as Grid
    from jaxsim.instance import Instance as Instance
    from jaxsim.logspace import kl_divergence as kl_divergence
    from jaxsim.methods.check import check_loss as check_loss
    from jaxsim.methods.existence import OptimumStatus as OptimumStatus
    from jaxsim.methods.listwise import kto_loss as kto_loss
    from jaxsim.methods.listwise import lipo_loss as lipo_loss
    from jaxsim.methods.listwise import plackett_luce_dpo_loss as plackett_luce_dpo_loss
    from jaxsim.methods.measure import PolicyMeasures as PolicyMeasures
    from jaxsim.methods.measure import measure_policy as measure_policy
    from jaxsim.methods.optimum import Optimum as Optimum
    from jaxsim.methods.optimum import population_optimum as population_optimum
    from jaxsim.methods.pairwise import dpo_loss as dpo_loss
    from jaxsim.methods.pairwise import exo_loss as exo_loss
    from jaxsim.methods.pairwise import hinge_loss as hinge_loss
    from jaxsim.methods.pairwise import ipo_loss as ipo_loss
    from jaxsim.methods.pairwise import orpo_loss as orpo_loss
    from jaxsim.methods.pairwise import reward_model_loss as reward_model_loss
    from jaxsim.methods.pairwise import robust_dpo_loss as robust_dpo_loss
    from jaxsim.methods.pairwise import simpo_loss as simpo_loss
    from jaxsim.methods.pairwise import slic_loss as slic_loss
    from jaxsim.methods.policy_gradient import dr_grpo as dr_grpo
    from jaxsim.methods.policy_gradient import grpo as grpo
    from jaxsim.methods.policy_gradient import ppo_clip as ppo_clip
    from jaxsim.methods.policy_gradient import reinforce as reinforce
    from jaxsim.methods.policy_gradient import rloo as rloo
    from jaxsim.methods.report import LossReport as LossReport
    from jaxsim.runs.summary import to_xarray as to_xarray
    from jaxsim.theorem.bounds import TpmBounds as TpmBounds
    from jaxsim.theorem.bounds import worst_case_shift as worst_case_shift
    from jaxsim.theorem.certify import certify as certify
    from jaxsim.theorem.critical import CriticalBetas as CriticalBetas
    from jaxsim.theorem.critical import critical_betas as critical_betas
    from jaxsim.theorem.ladder import Conditions as Conditions
    from jaxsim.theorem.ladder import safe_for_any_components as safe_for_any_components
    from jaxsim.theorem.verdict import Outcome as Outcome
    from jaxsim.theorem.verdict import Verdict as Verdict
    from jaxsim.tilting import Evaluation as Evaluation
    from jaxsim.tilting import MixtureWeights as MixtureWeights

__version__ = "0.1.0"

_HOME = {
    "Components": "families.spec",
    "Conditions": "theorem.ladder",
    "Counterexample": "engine.search",
    "CriticalBetas": "theorem.critical",
    "Evaluation": "tilting",
    "Family": "families.spec",
    "Feedback": "feedback",
    "FittedReward": "feedback",
    "Grid": "grid",
    "Instance": "instance",
    "LossReport": "methods.report",
    "MixtureWeights": "tilting",
    "Optimum": "methods.optimum",
    "OptimumStatus": "methods.existence",
    "Outcome": "theorem.verdict",
    "PolicyMeasures": "methods.measure",
    "Rewards": "families.spec",
    "Scalar": "families.spec",
    "Simulation": "engine.simulate",
    "Solution": "descent",
    "Status": "descent",
    "TpmBounds": "theorem.bounds",
    "Verdict": "theorem.verdict",
    "best_of_n": "engine.lift",
    "certify": "theorem.certify",
    "check_loss": "methods.check",
    "conditions": "engine.lift",
    "critical_betas": "theorem.critical",
    "dpo_loss": "methods.pairwise",
    "dr_grpo": "methods.policy_gradient",
    "evaluate": "engine.lift",
    "evaluate_grid": "engine.lift",
    "exo_loss": "methods.pairwise",
    "expected_pairs": "feedback",
    "expected_rankings": "feedback",
    "expected_thumbs": "feedback",
    "find_counterexample": "engine.search",
    "fit_reward": "feedback",
    "grpo": "methods.policy_gradient",
    "hinge_loss": "methods.pairwise",
    "ipo_loss": "methods.pairwise",
    "kl_divergence": "logspace",
    "kto_loss": "methods.listwise",
    "lipo_loss": "methods.listwise",
    "measure_policy": "methods.measure",
    "mixture_weights": "engine.lift",
    "natural_gradient": "descent",
    "objective": "engine.lift",
    "optimal_policy": "engine.lift",
    "orpo_loss": "methods.pairwise",
    "plackett_luce_dpo_loss": "methods.listwise",
    "population_optimum": "methods.optimum",
    "ppo_clip": "methods.policy_gradient",
    "reinforce": "methods.policy_gradient",
    "reward_model_loss": "methods.pairwise",
    "rloo": "methods.policy_gradient",
    "robust_dpo_loss": "methods.pairwise",
    "safe_for_any_components": "theorem.ladder",
    "sample_feedback": "feedback",
    "sample_instances": "engine.tiles",
    "simpo_loss": "methods.pairwise",
    "simulate": "engine.simulate",
    "slic_loss": "methods.pairwise",
    "solve": "engine.loop",
    "sufficient_beta": "engine.lift",
    "take_back_logits": "decoding",
    "theorem2": "engine.lift",
    "to_xarray": "runs.summary",
    "tpm": "engine.lift",
    "tpm_bounds": "engine.lift",
    "worst_case_shift": "theorem.bounds",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxsim' has no attribute {name!r}")
    value = getattr(import_module(f"jaxsim.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
