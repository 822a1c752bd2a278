"""Run sections of the notebook as scripts: sec.py SECTION... with parameters from env PARAMS (json)"""
import sys,json,os,time; sys.path.insert(0,'tests')
import conftest as C, types
m=types.ModuleType('nbsec'); sys.modules['nbsec']=m
P=json.loads(os.environ.get('PARAMS','{}'))
import torch; torch.set_num_threads(1)
for tag in ('parameters','setup',*sys.argv[1:]):
    for i,src in C.cells_tagged(tag):
        s=time.time(); C.execute(m,i,src)
        if tag not in('parameters','setup'): print('##',i,f'{time.time()-s:.0f}s',flush=True)
    if tag=='setup': exec(os.environ.get('EXTRA',''),m.__dict__)
    if tag=='parameters':
        for k,v in P.items(): setattr(m,k,v)
