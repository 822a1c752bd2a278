"""fd.py NAME OUT [N]: FD, KD, v errors of OUT/NAME now."""
import sys; sys.path.insert(0,'outputs/checkpoints')
from pathlib import Path
import judge as J, torch, time
torch.set_num_threads(1)
name,out,N=sys.argv[1],Path(sys.argv[2]),int(sys.argv[3])
nb=J.notebook_setup(Path('/root/w/jr')); nb.BUNDLED=out
model=nb.load_checkpoint(name)
ref=nb.Reference(**J.load_file(Path('/root/w/ref')/name/'reference.safetensors'))
tr,held=J.training_images(name,Path('/root/w/data'),J.RECIPES[name])
es=[]
for part in (held,tr):
    x0=part[:48].float()/127.5-1; e=[]
    for t in (20,100,200,350,500,700,900):
        eps=nb.image_noise(range(len(x0)),model.shape,t)
        with torch.inference_mode(): off=torch.cat([model(a,t)-b for a,b in zip(nb.add_noise(x0,eps,model.alpha_bar,t).split(16),eps.split(16))])/model.alpha_bar[t].sqrt()
        e.append(off.square().mean().item())
    print('held' if part is held else 'train',' '.join(f'{v:.3f}' for v in e),flush=True)
for S,eta in ((50,0.0),(50,1.0)):
    s=time.time(); im=nb.sample_images(model,range(N),S,eta); f=nb.image_features(im)
    fd=nb.jackknife(ref.distance,f); kd=nb.jackknife(lambda g: nb.kernel_distance(g,ref.heldout),f)
    print(S,eta,'FD',{k:round(v,1) for k,v in fd.items()},'KD',{k:round(v,2) for k,v in kd.items()},'near',round(ref.nearest(f).mean().item(),1),f'{time.time()-s:.0f}s',flush=True)
    from PIL import Image
    g=torch.cat([torch.cat(list(r),2) for r in im[:24].split(8)],1).permute(1,2,0).numpy(); Image.fromarray(g).save(f'/root/w/{name}-{S}-{int(eta)}.png')
