"""The columns of a table about models."""

COLUMNS = {
  "loss": "loss",
  "perplexity": "perplexity",
  "forward_kl": "KL(teacher‖·)",
  "reverse_kl": "KL(·‖teacher)",
  "top1_agreement": "top-1 %",
  "rougeL": "ROUGE-L",
  "exact_match": "exact match",
}
