"""From datasets on disk to batches: samples, the mixture, the sample cache, the feature cache."""
