"""Steps of training and evaluation: batch, loss, forward and backward passes, anomaly policy, auxiliary routers."""
