"""`alignment export`: a trained model as one folder that paddlenlp or transformers opens."""
