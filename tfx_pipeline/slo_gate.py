"""The load that candidate models must hold before they are pushed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from schema.errors import ServingError
from serving.loadtest import LoadRequest, asking, measure, slo_misses
from serving.slo import Slo
from tfx_pipeline.user_states import UserState

_LOGGER = logging.getLogger(__name__)
_K: Final = 20
_NUM_CANDIDATES: Final = 100
_TIMEOUT_S: Final = 2.0
_MAX_IN_FLIGHT: Final = 128
_SEED: Final = 1


def check_slo(slo: Slo, target: str, states: Sequence[UserState], result_file: Path) -> None:
    """Puts the load of an objective on a server.

    Args:
      slo: the objective.
      target: of the server, see RecommenderClient.
      states: users to ask for; what they have seen is excluded.
      result_file: gets what was measured, and what of the objective is missed, as JSON.

    Raises:
      ServingError: the objective is missed; the text says by how much.
    """
    requests = [LoadRequest(state.request, state.seen_item_ids) for state in states]
    with asking(target, requests, k=_K, num_candidates=_NUM_CANDIDATES, timeout_s=_TIMEOUT_S) as ask:
        result, _ = measure(ask, slo.rate_per_s, slo.duration_s, _SEED, _MAX_IN_FLIGHT)
    misses = slo_misses(slo, result)
    written = {"slo": slo.model_dump(), "misses": misses, "result": result.as_json()}
    result_file.write_text(json.dumps(written, indent=1), encoding="utf-8")
    for warning in result.warnings:
        _LOGGER.warning("load of the objective: %s", warning)
    if misses:
        raise ServingError(f"the objective (slo) is missed: {'; '.join(misses)}")
