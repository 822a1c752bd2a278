import re, pandas as pd
from pathlib import Path
m=Path('/work/main'); runs=pd.read_csv(m/'outputs/results/runs.csv'); e=pd.read_csv(m/'outputs/results/exercise-1.csv')
run=[r for r in e['run'].unique() if r.count('/')==2][-1]; e=e[e['run']==run]; info=runs[runs['run']==run].iloc[-1]
out=[f"Measured on {info['device']}, profile {info['profile']}, {info['date']}; lower is better, 95 % intervals; compare within a data set only.","",
"| data set | sampler | steps | N | FD-EffNet | real images score | seconds an image |","|---|---|---|---|---|---|---|"]
for d in ('mnist','cifar10','pokemon','butterflies','church'):
    x=e[e['dataset']==d]
    for meth in ('DDIM','DDPM'):
        for S in sorted(x[(x.method==meth)&(x.metric=='FD-EffNet')]['steps'].dropna().astype(int).unique()):
            r=x[(x.method==meth)&(x.metric=='FD-EffNet')&(x.steps==S)].iloc[-1]; s=x[(x.method==meth)&(x.metric=='seconds_per_image')&(x.steps==S)].iloc[-1]
            fl=x[(x.method=='real')&(x.metric=='FD-EffNet')&(x.N==r.N)].iloc[-1]
            out.append(f"| {d} | {meth} | {S} | {int(r.N)} | {r.value:.1f} [{r.low:.1f}, {r.high:.1f}] | {fl.value:.1f} | {s.value:.3f} |")
secs=['foundations','exercise-1','exercise-2','exercise-3','exercise-4','exercise-5','stability','speed']
mins={s:runs[(runs['run'].str.startswith(s+'/'))&(runs['run'].str.count('/')==2)].iloc[-1].minutes for s in secs}
out+=["","Minutes of the sections in that run, in float32 throughout: "+", ".join(f"{s} {v:.2f}" for s,v in mins.items())+"."]
p=m/'README.md'; t=p.read_text(); new=re.sub(r'<!-- record -->\n.*?<!-- /record -->',lambda _:'<!-- record -->\n'+'\n'.join(out)+'\n<!-- /record -->',t,flags=re.S)
print('same' if new==t else 'changed'); p.write_text(new)
