"""Small Hugging Face models of many architectures, with random weights, and a check that fits all of them."""
