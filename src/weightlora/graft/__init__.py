"""PEFT: handles, the omega vector, surgery, optimizer state, manifest, export. No other room knows PEFT's inside."""
