"""dpa_ds: federated dual-personalizing adapters (FedDPA) over one frozen LLM, at scale on DeepSpeed."""

__version__ = "0.1.0"
