"""Programs that measure the package on whole models: what users gain, next to what they have without it."""
