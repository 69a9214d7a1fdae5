"""From logits to tokens: sampling, speculation, pacing, and the loop over them. Knows numpy, and no OpenVINO."""
