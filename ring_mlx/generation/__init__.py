"""From a prompt to text: prefill, decoding, sampling, thoughts and tool calls."""
