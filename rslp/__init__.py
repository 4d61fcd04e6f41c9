"""rslp: joint fine-tuning of one Earth-observation encoder on many labelled datasets."""
