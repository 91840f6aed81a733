"""What every test needs: a Dynamo without memory of the test before."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks of Hugging Face models
    yield
    torch._dynamo.reset()
