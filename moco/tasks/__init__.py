"""What is trained on the engine: MoCo."""
