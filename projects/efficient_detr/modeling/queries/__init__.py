"""Where decoder queries come from."""

from efficient_detr.modeling.queries.denoising import ContrastiveDenoising
from efficient_detr.modeling.queries.proposals import ProposalHead
from efficient_detr.modeling.queries.two_stage import TwoStageQueries

__all__ = ["ContrastiveDenoising", "ProposalHead", "TwoStageQueries"]
