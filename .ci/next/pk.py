import sys; sys.path.insert(0,'outputs/checkpoints')
from pathlib import Path
import judge as J, torch
from train import Recipe
torch.set_num_threads(1)
nb=J.notebook_setup(Path('/root/w/jr')); nb.BUNDLED=Path('/root/w/run')
model=nb.load_checkpoint('pokemon'); sec=nb.Section('training')
ref=nb.Reference(**J.load_file('/root/w/ref/pokemon/reference.safetensors'))
held=ref.heldout
detail='race: (64, 96, 128), v, Muon 0.003, not on its way: 32,960 images in 34 minutes'
images,cols=J.read('pokemon',Path('/root/w/data'),64,3,{'style':('artwork',)}) if hasattr(J,'read') else __import__('train').read('pokemon',Path('/root/w/data'),64,3,{'style':('artwork',)})
apart=sorted(set(cols['dex'])); order=torch.randperm(len(apart),generator=torch.Generator().manual_seed(0)); chosen={apart[k] for k in order[:min(512,len(apart)//5)]}
h=images[torch.tensor([d in chosen for d in cols['dex']])]; print(len(h))
J.v_errors(nb,sec,model,h,detail)
for S,eta,m in ((50,0.0,'DDIM'),(50,1.0,'DDPM')):
    im=nb.sample_images(model,range(32),S,eta); f=nb.image_features(im)
    about={"N":32,"dataset":'pokemon',"method":m,"eta":eta,"steps":S,"spacing":"leading","seed":0,"detail":detail}
    for metric,of,n in ((ref.metric,ref.distance,int(ref.n_real)),("KD-EffNet",lambda g: nb.kernel_distance(g,ref.heldout),len(ref.heldout))):
        r=sec.add(metric,**nb.jackknife(of,f),n_real=n,**about); print(m,metric,r,flush=True)
    from PIL import Image
    g=torch.cat([torch.cat(list(r),2) for r in im[:24].split(8)],1).permute(1,2,0).numpy(); Image.fromarray(g).save(f'/root/w/pokemon-final-{m}.png')
