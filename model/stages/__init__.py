"""Training stages: each prepares a batch without gradient and gives a differentiable loss with."""
