"""Builds the bundles that are made of the two trained models: the funnel, and what needs no ScaNN."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from schema.errors import BundleError
from trainer.allow_lists import AllowLists
from trainer.bundle import appearing_whole, save_bundle
from trainer.checkpoint import read_checkpoint
from trainer.config import RankingConfig, RetrievalConfig
from trainer.fingerprint import CATALOGUE, Fingerprint, check_together, hash_catalogue
from trainer.funnel_export import ServedFunnel
from trainer.index import CandidateIndex
from trainer.index_build import exact_facts
from trainer.input_pipeline import load_catalogue
from trainer.preranker import PreRanking
from trainer.retrieval_export import ServedRetrieval, export, read_index
from trainer.run_ranking import restore as restore_ranker
from trainer.run_ranking import restore_preranker
from trainer.run_retrieval import attributes
from trainer.run_retrieval import restore as restore_retrieval
from trainer.sample_requests import golden_requests, sample_users
from trainer.transform_graph import TransformGraph
from trainer.user_lookup import UserLookup

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BundleFolders:
    """Where the bundles are written: local folders, absent or empty."""

    retrieval_exact: Path
    funnel: Path
    funnel_exact: Path


def build(retrieval_dir: Path, ranking_dir: Path, user_states: Sequence[str], folders: BundleFolders) -> None:
    """Builds the bundles from the checkpoints of two exported models and the index of the first.

    Args:
      retrieval_dir: exported retrieval model.
      ranking_dir: exported ranking model, of the same Transform graph and catalogue.
      user_states: file patterns of user-state examples.
      folders: where the bundles go.

    Raises:
      BundleError: the models are of different runs.
      CheckpointError: a model has no checkpoint, or one that does not fit the code.
    """
    fingerprints = {str(folder): Fingerprint.read(folder) for folder in (retrieval_dir, ranking_dir)}
    check_together(fingerprints)
    of_retrieval = fingerprints[str(retrieval_dir)]
    of_both = Fingerprint({**of_retrieval.parts, **fingerprints[str(ranking_dir)].parts})

    checkpoint, ranking_checkpoint = read_checkpoint(retrieval_dir), read_checkpoint(ranking_dir)
    spec, config = checkpoint.spec, checkpoint.read_config(RetrievalConfig)
    retrieval, ranker = restore_retrieval(checkpoint), restore_ranker(ranking_checkpoint)
    layer = TransformGraph(checkpoint.transform_output)
    catalogue = load_catalogue(checkpoint.catalogue_files(), checkpoint.transform_output, spec)
    if hash_catalogue(catalogue) != of_retrieval.parts[CATALOGUE]:
        raise BundleError(f"the checkpoint of {retrieval_dir} holds other items than its index")
    allowed = attributes(checkpoint.catalogue_files(), spec, config.index.allow_list)
    index = read_index(retrieval_dir, AllowLists(allowed))
    exact = CandidateIndex(index.exact, None, index.allow_lists)
    sample = sample_users(user_states, spec)

    served = ServedRetrieval(retrieval, exact, layer, catalogue, spec, config.max_k)
    golden = golden_requests(served.calls(), sample)
    export(served, exact_facts(exact, config.max_k), folders.retrieval_exact, of_retrieval, golden)

    users = UserLookup(user_states, spec)
    preranking = None
    preranker_config = ranking_checkpoint.read_config(RankingConfig).preranker
    if preranker_config is not None:
        student = restore_preranker(ranking_checkpoint, preranker_config, ranker)
        moment = ranking_checkpoint.settings["train_end_unix_s"]
        preranking = PreRanking(student, moment, preranker_config.num_kept)
    for searched, folder in ((index, folders.funnel), (exact, folders.funnel_exact)):
        funnel = ServedFunnel(
            retrieval, searched, ranker, layer, catalogue, users, spec, config.max_k, preranking
        )
        with appearing_whole(folder) as partial:
            save_bundle(funnel, partial, of_both, golden_requests(funnel.calls(), sample))
        _logger.info("phase=export_funnel items=%d path=%s", len(catalogue), folder)
