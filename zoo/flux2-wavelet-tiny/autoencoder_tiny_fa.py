from favae import AutoencoderTinyFA  # noqa: F401
