""" Controls: rows that put the scores of a form of SOT attention through softmax

What a form gains over its control is the plan's doing, and not that of the scores or of the parameters around them.
"""
from typing import Any, Dict, Optional, Tuple

__all__ = ['control_of']

# Forms that were on trial, `candidate=NAME` among the arguments of their runs, and their controls. The lines of the
# runs are kept, in hub/study; the forms are in the repository's history, at the commits that the lines name.
TRIED = {
    'bias': 'dot',
    'half': 'cosine',
    'half_local': 'cosine_local',
    'log_plan': 'cosine',
    'marginals': 'cosine_gate',
    'plan': 'cosine',
    'plan_common_local': 'cosine_common_local',
    'plan_dot': 'dot',
    'plan_local': 'cosine_local',
    'plan_masked': 'cosine_masked',
    'plan_mass': 'cosine_mass',
    'plan_mass_local': 'cosine_mass_local',
    'plan_near': 'cosine_near',
    'relaxed': 'cosine',
    'shares': 'cosine',
    'shares_context': 'cosine_context',  # now cct_2_sot_shares
    'shares_local': 'cosine_local',
    'shares_mass': 'cosine_mass',
    'shares_norm_local': 'cosine_norm_local',
}


def control_of(model: str, kwargs: Dict[str, Any]) -> Optional[Tuple[str, Dict[str, Any]]]:
    """The row of a study, model and arguments, that is the control of a row; None if it has none."""
    if kwargs.get('candidate') in TRIED:
        return model, {**kwargs, 'candidate': TRIED[kwargs['candidate']]}
    if model.endswith('_sot_shares') or kwargs.get('attn') == 'sot_shares':
        return None if kwargs.get('sot_iters') == 0 else (model, {**kwargs, 'sot_iters': 0})
    return None
