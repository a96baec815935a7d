"""The model: config.json -> Architecture, safetensors -> Decoder. It knows nothing of pages, ranks or requests."""
