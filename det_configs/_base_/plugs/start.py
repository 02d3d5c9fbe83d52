# Start, the control: the last layer of each branch scaled by one half, as a fresh sigmoid gate does, and no attention;
# the detector is the stock one all along.
plug = dict(type='Start', value=0.5)
