"""Language models and adapters: LoRA federated over the roles of Shakespeare's plays, a client each."""
