"""One widget a file; widgets know what they show and send messages up, never the store or the engine."""
