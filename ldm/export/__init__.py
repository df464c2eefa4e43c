"""Taking a trained model elsewhere: its model card and the Hugging Face Hub."""
