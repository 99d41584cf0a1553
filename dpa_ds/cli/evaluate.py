"""What launch/evaluate.py runs on every rank of the job."""

from dpa_ds.evaluation.runner import evaluate

__all__ = ["evaluate"]
