"""Held-out loss of the hosted clients between rounds, and scores of a few of their answers."""

from collections.abc import Sequence

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.config.schema import EvaluationConfig
from dpa_ds.data.sources import NO_TASK, ClientInfo
from dpa_ds.evaluation.while_training import Scorer, own_and_all
from dpa_ds.federation.aggregation.base import ServerState
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.trainer import Trainer
from dpa_ds.inference.client_model import ClientModel
from dpa_ds.runs.folder import client_name
from dpa_ds.runs.tracking import Tracker

Evaluated = dict[int, dict[str, float]]
"""Client id -> what was found: `held_out_loss`, `P`, `TTP`."""


class RoundEvaluation:
    """What the recipe wants to be evaluated after which rounds. Every method is collective: all ranks of the group.

    Args:
        scorer: where `evaluation.scores_every_rounds` asks for answers while training.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        num_rounds: int,
        trainer: Trainer,
        scorer: Scorer | None,
        tracker: Tracker,
    ) -> None:
        self._config = config
        self._num_rounds = num_rounds
        self._trainer = trainer
        self._scorer = scorer
        self._tracker = tracker

    def evaluate_if_due(self, clients: Sequence[HostedClient], state: ServerState, server_round: int) -> Evaluated:
        """Evaluate what is due after `server_round`; 0 is before training."""
        evaluated: Evaluated = {client.client_id: {} for client in clients}
        if self._loss_is_due(server_round):
            self._trainer.engine.write_state(GLOBAL, state.adapter)
            for client in clients:
                if client.held_out is not None:
                    evaluated[client.client_id]["held_out_loss"] = self._held_out_loss(client)
        if self._scores_are_due(server_round):
            # Installed here as well, because no loss need have been due. The local adapter the scorer installs itself.
            self._trainer.engine.write_state(GLOBAL, state.adapter)
            for client in clients:
                evaluated[client.client_id] |= self._score(client, state, server_round)
        return evaluated

    def _loss_is_due(self, server_round: int) -> bool:
        every = self._config.every_rounds
        return server_round in (0, self._num_rounds) or (every > 0 and server_round % every == 0)

    def _scores_are_due(self, server_round: int) -> bool:
        every = self._config.scores_every_rounds
        return self._scorer is not None and server_round > 0 and server_round % every == 0

    def _held_out_loss(self, client: HostedClient) -> float:
        """With the method's fixed mix. A local adapter that was never trained (client not sampled so far) gets
        no weight."""
        assert client.held_out is not None
        self._trainer.engine.write_state(LOCAL, client.state.local_adapter)
        alpha = self._trainer.schedule.inference_alpha if client.state.num_steps[LOCAL] else 0.0
        return self._trainer.held_out_loss(client.held_out, alpha, self._config.max_examples)

    def _score(self, client: HostedClient, state: ServerState, server_round: int) -> dict[str, float]:
        """P and TTP of a few answers; scores by task go to TensorBoard."""
        assert self._scorer is not None
        info = ClientInfo(client.client_id, client.label, client.tasks or (NO_TASK,))
        was_trained = client.state.num_steps[LOCAL] > 0
        model = ClientModel(info, client.state.local_adapter, was_trained, client.references)
        scores = self._scorer.score(model, state.reference_mean)
        tagged = {f"scores/{task}": score for task, score in scores.items()}
        self._tracker.scalars(client_name(client.client_id), tagged, server_round)
        own, everything = own_and_all(scores, info.own_tasks)
        return {"P": own, "TTP": everything}
