"""Activations of prompts: capture, batched reading, shards on disk, remote capture."""

from replib.activations.capture import capture, capture_pair, capture_to, stream
from replib.activations.config import CaptureConfig
from replib.activations.remote import trace_capture
from replib.activations.store import Activations

__all__ = ["Activations", "CaptureConfig", "capture", "capture_pair", "capture_to", "stream", "trace_capture"]
