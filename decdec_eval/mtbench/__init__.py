"""MT-Bench: questions -> answers -> judgments -> scores, in FastChat's file formats."""
