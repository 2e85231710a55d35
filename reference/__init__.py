"""The reference models: their dataset, trainings and scores. Not part of the package."""
