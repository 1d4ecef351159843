"""MT-Bench: questions -> answers -> judgments -> scores."""
