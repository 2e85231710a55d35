"""Step distillation: from a flow that is told one time to a flow map that is told where its steps end."""
