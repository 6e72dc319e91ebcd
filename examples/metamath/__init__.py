"""MetaMathQA to GSM8K: the protocols, the data, the sweep's parts and the table."""
