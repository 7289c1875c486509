"""Model families. Each maps ids and pictures to hidden states over paged KV; none knows of requests or slots."""
