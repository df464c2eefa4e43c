"""The LightningModules of both stages."""
